"""Every method of the package keeps the promises of its hook."""

from plait.testing import conformance

test_bert_attack = conformance("bert-attack")
test_co_attack = conformance("co-attack")
test_dra = conformance("dra")
test_pgd = conformance("pgd")
test_pgd_cos = conformance("pgd-cos")
test_sa_aet = conformance("sa-aet")
test_sep_attack = conformance("sep-attack")
test_sga = conformance("sga")
test_transfer = conformance("transfer")
test_digit_scenes = conformance("digit-scenes")
test_scene_encoder = conformance("scene-encoder")
