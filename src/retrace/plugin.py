"""Makes models of this package known to lm-eval's own command line: `lm_eval --model quietstar ...`.

Versions later than 0.4.13 find models of other packages by entry points, group `lm_eval.models` (lm-eval's pull
request 4013), which pyproject.toml declares. 0.4.13 reads none, and looks the model up before any code of ours could
run. Of all that it imports until then, torch alone calls entry points, those of its group `torch.backends`. So this is
one, and does there what later versions do by themselves. In every other program that imports torch it does nothing.
Delete it when the oldest lm-eval that is supported reads the group.

Nothing is imported at the top: this runs in the middle of an import of torch.
"""

from __future__ import annotations


def register_models() -> None:
    """Enter the models of group `lm_eval.models` into lm-eval's registry, as names that are imported when asked for."""
    import sys

    if "lm_eval" not in sys.modules:
        return
    from importlib.metadata import entry_points

    import lm_eval.models  # noqa: F401  # its own come first: they are only entered where the registry is empty
    from lm_eval.api.registry import model_registry

    for entry in entry_points(group="lm_eval.models"):
        if entry.name not in model_registry:
            model_registry.register(entry.name, target=entry)
