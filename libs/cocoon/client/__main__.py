"""`python -m cocoon.client`: the sidecar, configured by COCOON_SIDECAR_*."""

from cocoon.client.serve import run_sidecar
from cocoon.client.settings import SidecarSettings
from cocoon.telemetry.logs import configure_logs

settings = SidecarSettings()
configure_logs("sidecar", settings.log_level)
run_sidecar(settings)
