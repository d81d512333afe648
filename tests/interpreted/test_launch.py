"""What the interpreter cannot do is refused."""

import pytest
import torch

from tinylora.kernels.reduce_dm import reduce_dm_triton


def test_bfloat16_is_refused():
    s = torch.zeros(4, 2, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match="bfloat16"):
        reduce_dm_triton(s, s, [4], 1, None, 2)
    reduce_dm_triton(s.float(), s.float(), [4], 1, None, 2)
