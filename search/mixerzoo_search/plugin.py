"""mixerzoo_search's plugin: its commands. Heavy imports wait until a command runs."""

from __future__ import annotations

import click

from mixerzoo.hookspecs import hookimpl


@hookimpl
def register_commands(cli: click.Group) -> None:
    """Add `search`, `distill`, `refit`, `finetune`, `profile`, `prune` and `study`."""
    from mixerzoo_search.distill_command import distill_command
    from mixerzoo_search.finetuning.command import finetune_command
    from mixerzoo_search.latency.command import latency_command
    from mixerzoo_search.profile.command import profile_command
    from mixerzoo_search.prune.command import prune_command
    from mixerzoo_search.refitting.command import refit_command
    from mixerzoo_search.search_command import search_command
    from mixerzoo_search.sparsity.command import study_group

    cli.add_command(search_command)
    cli.add_command(distill_command)
    cli.add_command(refit_command)
    cli.add_command(finetune_command)
    cli.add_command(latency_command)
    cli.add_command(profile_command)
    cli.add_command(prune_command)
    cli.add_command(study_group)
