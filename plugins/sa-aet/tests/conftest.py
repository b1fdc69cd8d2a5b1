import pytest
from plait_clip.examples import tiny_fusion_model


@pytest.fixture(scope="session")
def blip():
    return tiny_fusion_model()
