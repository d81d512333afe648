"""These tests run kernels in Triton's interpreter: float32 and float16 only, small shapes, one program after another."""

import pytest

from tinylora.kernels import launch


@pytest.fixture(autouse=True)
def interpreted():
    assert launch.INTERPRETED, "run tests/test_interpreted.py, which sets TRITON_INTERPRET=1 for this folder"
