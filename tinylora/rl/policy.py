"""What is trained: an adapter on the engine's model, or a baseline beside it."""

from tinylora.adapter.on_decoder import Adapter
from tinylora.model.decoder import Decoder
from tinylora.rl.baselines import Baseline
from tinylora.rl.config import TrainConfig

Policy = Adapter | Baseline


def new_policy(model: Decoder, c: TrainConfig) -> Policy:
    """What these settings train on this model."""
    if c.method in ("lora", "full"):
        return Baseline(model, c.method, c.r, c.target_modules, c.seed)
    return Adapter(model, c.adapter)


def baseline_of(policy: Policy) -> Baseline | None:
    """The policy where it is a baseline, whose network scores by itself."""
    return policy if isinstance(policy, Baseline) else None


def adapter_of(policy: Policy) -> Adapter:
    """The policy, which is an adapter: `TrainConfig` has refused everything else."""
    assert isinstance(policy, Adapter)
    return policy
