from plait.testing import conformance

test_guideline = conformance("content-shift-guideline")
test_score = conformance("content-shift-score")
test_amalgamation = conformance("amalgamation")
test_extraction = conformance("content-shift")
test_gate = conformance("amalgamation-gate")
