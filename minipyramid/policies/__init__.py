"""Policies by name. Each stands in a file of its own, which is imported when it is asked for.

To add one, write a file with a frozen dataclass that derives from `Policy` (or from `HeldShare`, if it
computes every layer over the whole prompt and holds a share of it), and give it a line in `POLICIES`. The
engine then runs it in batches, plans it and fits it to budgets, and the evaluation and the benchmark have a
row for it. A class of your own needs no line: name where to import it from, `--policy package.module:Name`.
"""

import importlib
from pathlib import Path

from minipyramid.config import read_json
from minipyramid.errors import ConfigError, expect_type, nearest
from minipyramid.policies.own import checked
from minipyramid.policy import Policy
from minipyramid.presets import PRESETS
from minipyramid.pyramid import PyramidConfig
from minipyramid.settings import settings_of

AnyPolicy = str | Path | Policy
SETTINGS = "pyramid.json"  # a checkpoint's own settings file
# name: where its class stands, below this package unless it is written in full
POLICIES = {
    "full": "minipyramid.policy:Policy",
    "pyramid": "minipyramid.pyramid:PyramidConfig",
    "profile": "profile:Profile",
    "streaming": "streaming:Streaming",
    "h2o": "h2o:H2O",
    "snapkv": "snapkv:SnapKV",
    "pyramidkv": "pyramidkv:PyramidKV",
    "keydiff": "keydiff:KeyDiff",
    "random": "random:Random",
}
SPLIT = "-split"  # after a policy's name: it chooses, and `auto` says how many each layer holds


def pick_policy(policy: AnyPolicy, directory: Path, layers: int) -> Policy:
    """The policy that a name, a file or a configuration stands for, with a checkpoint's directory and depth.

    `pyramid` is PyramidInfer with the checkpoint's settings, if these are PyramidInfer's, else with the
    published ones; `profile` is the checkpoint's own.

    Raises:
        CheckpointError: a file is missing or no JSON.
        ConfigError: a name is not known, or a setting cannot be.
    """
    if isinstance(policy, Policy):
        return checked(policy)
    expect_type("policy", policy, (str, Path), "a policy's or preset's name, a path or a configuration")
    name = str(policy)
    if isinstance(policy, Path) or name.endswith(".json"):
        return load_policy(Path(policy))
    if name in ("auto", "pyramid", "profile"):
        return checkpoint_policy(name, directory, layers)
    if name.endswith(SPLIT):
        from minipyramid.policies.split import Split

        choice = name.removesuffix(SPLIT)
        if choice == "profile" or (choice not in POLICIES and ":" not in choice):
            those = [known for known in POLICIES if known not in ("full", "pyramid", "profile")]
            raise ConfigError(f"there is no policy {choice!r} for {name!r}; {nearest(choice, those)}")
        return Split(checkpoint_policy("auto", directory, layers), by_default(choice))
    return PyramidConfig.preset(name) if name in PRESETS else by_default(name)


def checkpoint_policy(name: str, directory: Path, layers: int) -> Policy:
    """The checkpoint's settings if `name` is theirs or `auto`, else the published ones."""
    beside = directory / SETTINGS
    # A link that leads nowhere is an error and not absent.
    own = load_policy(beside) if beside.exists() or beside.is_symlink() else None
    if own is not None and (name == "auto" or type(own) is class_of(name)):
        return own
    if name == "profile":
        raise ConfigError(f"{directory} has no profile; python -m minipyramid.calibrate finds one")
    return PyramidConfig.for_layers(layers)


def load_policy(path: Path) -> Policy:
    """Settings from a JSON file; its field `policy` names their policy, PyramidInfer if it has none.

    Raises:
        CheckpointError: the file is missing or no JSON.
        ConfigError: a name is no setting, or a value cannot be.
    """
    settings = read_json(path, holds="a policy's settings")
    name = settings.pop("policy", "pyramid")
    if not isinstance(name, str) or name not in POLICIES:
        raise ConfigError(f"{path}: there is no policy {name!r:.60}; {nearest(str(name), POLICIES)}")
    if name == "profile":
        from minipyramid.policies.profile_file import read_profile

        return read_profile(settings, path)
    return settings_of(class_of(name), settings, str(path))


def by_default(name: str) -> Policy:
    """A policy with its default settings."""
    kind = class_of(name)
    try:
        return checked(kind())
    except TypeError as error:
        raise ConfigError(f"policy {name} has no default for a setting ({error}); give it one") from error
    except (Exception, SystemExit) as error:  # a class of the user's own may do anything
        raise ConfigError(f"policy {name!r} cannot be made ({error!r:.120}); mend its class") from error


def class_of(name: str) -> type[Policy]:
    """A policy's class, by its name or by its place."""
    place = POLICIES.get(name, name)
    if ":" not in place:
        known = ["auto", *POLICIES, *PRESETS]
        raise ConfigError(
            f"there is no policy or preset {name!r:.60}; {nearest(name, known)}, or a .json file"
        )
    module, _, attribute = place.partition(":")
    if name in POLICIES and "." not in module:
        module = f"{__name__}.{module}"
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:  # a module of the user's own may do anything
        raise ConfigError(
            f"policy {name!r} cannot be imported ({error!r:.120}); expected package.module:Name"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Policy)):
        raise ConfigError(
            f"policy {name!r} is {found!r:.60}, expected a class that derives from minipyramid.Policy"
        )
    return found
