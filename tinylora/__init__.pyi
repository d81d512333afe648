from tinylora.adapter.attached import AttachedAdapter as AttachedAdapter
from tinylora.adapter.attached import attach as attach
from tinylora.adapter.config import TinyLoRAConfig as TinyLoRAConfig
from tinylora.adapter.on_decoder import Adapter as Adapter
from tinylora.errors import InputError as InputError
from tinylora.loading import load_adapter as load_adapter
from tinylora.model.loader import load_model as load_model

__version__: str
__all__: list[str]
PLACES: dict[str, str]
