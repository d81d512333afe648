"""These tests run kernels in Triton's interpreter: float32 and float16 only, small shapes, one program after another."""

from collections.abc import Iterator

import pytest

from tinylora.kernels import launch


@pytest.fixture(autouse=True)
def interpreted() -> None:
    assert launch.INTERPRETED, "run tests/kernels/test_interpreted.py, which sets TRITON_INTERPRET=1 for this folder"


@pytest.fixture(autouse=True, scope="session")
def scalars() -> Iterator[None]:
    """A loop's bound is a number. Triton 3.6 asks int() of an array of one number, which NumPy 2.5 refuses; 3.9 squeezes it."""
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def with_index(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang_tensor", with_index)
        yield
