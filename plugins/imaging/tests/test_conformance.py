"""Every method keeps the promises of its hook."""

from plait.testing import conformance

test_photos = conformance("photos")
test_image_folder = conformance("image-folder")
test_image_pairs = conformance("image-pairs")
test_hf_dataset = conformance("plait-imaging/hf-dataset", hook="load_data")
test_rain = conformance("rain")
test_poisson_gaussian_noise = conformance("poisson-gaussian-noise")
test_motion_blur = conformance("motion-blur")
test_downsample = conformance("downsample")
test_jpeg = conformance("jpeg")
test_compose = conformance("compose")
test_median = conformance("plait-imaging/median", hook="restore")
test_total_variation = conformance("total-variation")
test_wavelet_shrinkage = conformance("wavelet-shrinkage")
test_richardson_lucy = conformance("richardson-lucy")
test_torch_model = conformance("torch-model")
test_psnr_ssim = conformance("psnr-ssim")
