"""``phalanx completion``: the script that teaches a shell our words."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class


@click.command(
    "completion",
    short_help="Print the completion script of a shell.",
    epilog='Example: eval "$(phalanx completion bash)"',
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def command(ctx: click.Context, shell: str) -> None:
    """Print the completion script for SHELL.

    \b
    bash:  eval "$(phalanx completion bash)"        (in ~/.bashrc)
    zsh:   eval "$(phalanx completion zsh)"         (in ~/.zshrc)
    fish:  phalanx completion fish > ~/.config/fish/completions/phalanx.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None
    script = kind(ctx.find_root().command, {}, "phalanx", "_PHALANX_COMPLETE")
    # Not .source(): for bash that starts a bash only to ask for its version.
    click.echo(script.source_template % script.source_vars())
