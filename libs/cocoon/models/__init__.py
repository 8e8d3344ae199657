"""What a served model is made of: manifests, and folders hashed and compared with them."""

from cocoon.models.manifest import ModelFile, ModelManifest

__all__ = ["ModelFile", "ModelManifest"]
