"""A group of verbs in which a word that is none gets the nearest."""

from __future__ import annotations

import click

from strategies.errors import did_you_mean


class Nearest(click.Group):
    """Names the nearest verb, and all of them, when there is no such one."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Look a verb up."""
        if args and self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            raise click.UsageError(
                f"There is no verb '{args[0]}'. {did_you_mean(args[0], self.list_commands(ctx))}", ctx
            )
        return super().resolve_command(ctx, args)
