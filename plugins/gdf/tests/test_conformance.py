"""Every promise of every method."""

from plait.testing import conformance

test_gdf = conformance("gdf")
test_dift = conformance("dift")
test_ddpm_seg = conformance("ddpm-seg")
test_noise_report = conformance("noise-report")
test_activation_ranking = conformance("activation-ranking")
