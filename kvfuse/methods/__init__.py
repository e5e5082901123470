"""Ways to answer a question, under one contract: baselines, Cache-to-Cache and its controls."""

from kvfuse.methods.cache_to_cache import Fused, Mismatched, Zeroed
from kvfuse.methods.contract import Answer, Method
from kvfuse.methods.routing import Cascade, Routed, Router
from kvfuse.methods.single import Single
from kvfuse.methods.text_to_text import TextToText

__all__ = ["Answer", "Cascade", "Fused", "Method", "Mismatched", "Routed", "Router", "Single", "TextToText", "Zeroed"]
