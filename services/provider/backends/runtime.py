"""onnxruntime without its telemetry: import it from here only.

From 1.32 on it writes below HOME and asks for its maker's collector. It reads the variable when it
is loaded; afterwards is too late.
"""

from __future__ import annotations

import os

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import onnxruntime as ort

__all__ = ["ort"]
