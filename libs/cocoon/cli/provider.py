"""`./cocoon provider`: from a GPU to earning. Each verb is in a module of its own."""

from __future__ import annotations

import typer

from cocoon.cli import (
    provider_doctor,
    provider_earnings,
    provider_init,
    provider_run,
    provider_status,
    provider_why,
)

app = typer.Typer(
    help="Be a provider: set up, check, run, and see what it earns.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.command("init")(provider_init.init)
app.command("doctor")(provider_doctor.doctor)
app.command("run")(provider_run.run)
app.command("status")(provider_status.status)
app.command("earnings")(provider_earnings.earnings)
app.command("drain")(provider_status.drain)
app.command("reload")(provider_status.reload)
app.command("why")(provider_why.why)
app.command("simulate")(provider_why.simulate)
