"""Looking into a model: what each layer did to a text. `Inspection.of` runs it once; the `show_*` ask the recording."""

from models.inspection.attention import HeadNumbers
from models.inspection.inspection import Cosine, Inspection, TopTokens
from models.inspection.recording import Recording, memory_needed

__all__ = ["Cosine", "HeadNumbers", "Inspection", "Recording", "TopTokens", "memory_needed"]
