"""Every method of the package keeps the promises of its hook."""

from plait.testing import conformance

test_load_data_four_tasks = conformance("plait-wemoe/four-tasks", hook="load_data")
test_load_model_multi_task_vit = conformance("plait-wemoe/multi-task-vit", hook="load_model")
test_load_model_model_folder = conformance("plait-wemoe/model-folder", hook="load_model")
test_load_model_text_classifier = conformance("plait-wemoe/text-classifier", hook="load_model")
test_merge_wemoe = conformance("plait-wemoe/wemoe", hook="merge")
test_merge_wemoe_icml = conformance("plait-wemoe/wemoe-icml", hook="merge")
test_merge_e_wemoe = conformance("plait-wemoe/e-wemoe", hook="merge")
test_merge_e_wemoe_fast = conformance("plait-wemoe/e-wemoe-fast", hook="merge")
test_merge_e_wemoe_published = conformance("plait-wemoe/e-wemoe-published", hook="merge")
test_merge_individual = conformance("plait-wemoe/individual", hook="merge")
test_merge_simple_average = conformance("plait-wemoe/simple-average", hook="merge")
test_merge_task_arithmetic = conformance("plait-wemoe/task-arithmetic", hook="merge")
test_merge_ties = conformance("plait-wemoe/ties", hook="merge")
test_merge_dare = conformance("plait-wemoe/dare", hook="merge")
test_merge_fisher = conformance("plait-wemoe/fisher", hook="merge")
test_merge_regmean = conformance("plait-wemoe/regmean", hook="merge")
test_merge_adamerging = conformance("plait-wemoe/adamerging", hook="merge")
test_merge_concrete = conformance("plait-wemoe/concrete", hook="merge")
test_optimize_multi_task = conformance("plait-wemoe/multi-task", hook="optimize")
test_evaluate_multi_task = conformance("plait-wemoe/multi-task", hook="evaluate")
