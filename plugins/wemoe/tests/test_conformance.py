"""Every method keeps the promises of its hook."""

from plait.testing import conformance

test_wemoe = conformance("e-wemoe")
test_fisher = conformance("fisher")
test_multi_task = conformance("multi-task")
test_multi_task_vit = conformance("multi-task-vit")
test_four_tasks = conformance("four-tasks")
