"""`python -m cocoon.client`: the sidecar, configured by COCOON_SIDECAR_*."""

from cocoon.client.serve import run_sidecar
from cocoon.client.settings import SidecarSettings

run_sidecar(SidecarSettings())  # type: ignore[call-arg]  # the environment fills it
