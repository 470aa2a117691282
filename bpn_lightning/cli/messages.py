"""One-line messages from the parser's errors.

jsonargparse reports an error in a nested value as a tree of all candidate types and why each failed. The
leaf describes the problem, and the types of the parser the expected values.
"""

import re
import sys
from collections.abc import Iterable

from jsonargparse import ArgumentParser

from bpn_lightning.errors import did_you_mean, needs_trust

__all__ = ["SHORT_NAMES", "explain", "shorten_help"]

_HELP = "`bpn-fit --help_all` shows all."

#: Arguments of torch's DataLoader that users pass to data modules.
_OF_DATALOADERS = (
    "num_workers",
    "pin_memory",
    "persistent_workers",
    "prefetch_factor",
    "multiprocessing_context",
)
_NO_WORKERS = (
    "a stream keeps its samples in memory and indexes batches, so it needs no worker processes. "
    "Leave it out"
)

#: The modules of the classes that have short names.
SHORT_NAMES = (
    "torch.optim",
    "torch.optim.lr_scheduler",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.loggers",
    "lightning.pytorch.profilers",
    "lightning.pytorch.strategies",
)


def explain(message: str, parser: ArgumentParser) -> str:
    """A one-line message with the given value, its key, the expected type, and the nearest valid name.

    Recognizes unknown options and keys, missing arguments, values of the wrong type, and imports that are
    not allowed. For anything else the last line of the message is used.

    Args:
        message: of the parser's error.
        parser: the parser that raised it, with the known options.
    """
    for rule in (_denied, _unknown_flag, _unknown_key, _missing, _last_line, _wrong_value):
        explained = rule(message, parser)
        if explained:
            return explained
    return " ".join(message.split())


def _denied(message: str, parser: ArgumentParser) -> str | None:
    """An import that is not allowed; the parser's own message suggests to allow it in code."""
    match = re.search(r"Importing '([^']+)' is not allowed, denied by the '([^']+)' entry", message)
    if not match:
        return None
    path = _path(message) or "a class path"
    if match[2] != "*":
        return (
            f"Expected {path} to be a class of its type, but got {match[1]!r}: {match[2]} runs or loads "
            "code, opens files or uses the network, so none of it can be used. Name another class."
        )
    return needs_trust(path, match[1])


def _unknown_flag(message: str, parser: ArgumentParser) -> str | None:
    match = re.match(r"unrecognized arguments: (\S+)", message)
    if not match:
        return None
    given = match[1].partition("=")[0]
    if not given.startswith("-"):
        return f"Expected an option, but got {given!r}. Options start with --."
    flag = given.removeprefix("--").removesuffix("+")
    return f"There is no option {given}.{_nearest_option(flag, parser, '--')} {_HELP}"


def _unknown_key(message: str, parser: ArgumentParser) -> str | None:
    """A key that a class, or a group of options, does not have."""
    group = re.search(r"Group '([^']+)' does not accept option '([^']+)'", message)
    if group:
        key = f"{group[1]}.{group[2]}"
        return f"There is no key {key}.{_nearest_option(key, parser)} {_HELP}"
    option = re.search(r"Option '([^']+)' is not accepted", message)
    if not option:
        return None
    path = _path(message[: option.start()])
    if not path:
        return f"There is no key {option[1]}.{_nearest_option(option[1], parser)} {_HELP}"
    classes = re.findall(r"class_path '([^']+)'", message[: option.start()])
    classes += re.findall(r"class_path='([^']+)'", message[option.end() :])
    name = (
        classes[-1] if message[: option.start()].count("class_path '") else next(iter(classes), "")
    )
    wrong = option[1].partition(".")[0]
    if wrong in _OF_DATALOADERS and path.startswith("data"):
        return f"{name.rpartition('.')[2] or 'A stream'} has no argument {wrong!r} ({path}): {_NO_WORKERS}."
    if not name:
        return f"There is no key {path}.{wrong}. {_HELP}"
    known = _arguments(name)
    near = did_you_mean(wrong, known)
    if "." in option[1] and wrong not in known:
        near = did_you_mean(wrong, ["init_args", "class_path"]) or near
    return (
        f"{name.rpartition('.')[2]} has no argument {wrong!r} ({path}).{near} "
        f"It takes {', '.join(known) if known else 'none'}."
    )


def _missing(message: str, parser: ArgumentParser) -> str | None:
    """An argument without a default: of the command, or of a class."""
    match = re.search(r"the following arguments are required: (.+)", message)
    if not match:
        return None
    path = _path(message)
    if not path:
        return (
            f"Expected a value for {match[1]}, but got none. Name an experiment, such as "
            "--config digits_inc.yaml, or set it."
        )
    keys = ", ".join(f"{path}.init_args.{key}" for key in match[1].split(", "))
    return f"Expected a value for {keys}, but got none. Set it on the command line or in a config."


def _last_line(message: str, parser: ArgumentParser) -> str | None:
    """The last line that is not just a candidate type."""
    tree, _, given = message.partition("Given value type:")
    lines = [line.strip(" -") for line in tree.splitlines()]
    lines = [line for line in lines if line and not re.match(r"Expected an? [<t]", line)]
    path = _path(message)
    if not path or lines[-1].endswith(":"):
        return None
    reason, _, got = lines[-1].partition(" Got value: ")
    reason = re.sub(r'^(Parser key "[^"]+"|Type .* callable class): ', "", reason).rstrip(".")
    reason = re.sub(r"<class '([^']+)'>", r"\1", reason)
    value = got or given.partition("Given value: ")[2].strip()
    shown = repr(value) if value and "(" not in value else "an error"
    word = re.findall(r"\w+", reason)[-1]
    names = [name for module in (*SHORT_NAMES, "bpn_lightning.nn") for name in _names_in(module)]
    near = "" if word in names else did_you_mean(word, names)
    return f"Expected {path} to match its type, but got {shown}: {reason}.{near} {_HELP}"


def _wrong_value(message: str, parser: ArgumentParser) -> str | None:
    """A value of the wrong type at the innermost key, with all allowed types."""
    single = re.search(r"Expected an? ([^\n]+?)\. Got value: ([^\n]*)", message)
    union = re.search(r"Given value: ([^\n]*)", message)
    if single:
        types, value, end = single[1], single[2], single.start()
    elif union:
        end = union.start()
        subtypes = re.findall(r"Subtypes: \[([^\n]*)\]\n", message[:end])
        if not subtypes:
            return None
        types, value = subtypes[-1], union[1]
    else:
        return None
    path, nested = _path(message[:end]), re.match(r"NestedArg\(key='([^']+)'", value)
    if nested:
        return f"There is no key {path}.{nested[1]}: {path} is a single value. {_HELP}"
    return f"Expected {path} to be {_readable(types)}, but got {value}."


def _path(text: str) -> str:
    """The key that a message refers to, joined from the nested keys, outermost first."""
    keys = re.findall(r'Parser key "([^"]+)"', text)
    found = keys[:1]
    for key in keys[1:]:
        if key == found[-1]:
            continue
        found.append(key if key.startswith("init_args.") else f"init_args.{key}")
    return ".".join(found)


def _nearest_option(key: str, parser: ArgumentParser, prefix: str = "") -> str:
    """The nearest option below the same parent, so that a long common prefix has no influence."""
    known = [
        option.removeprefix("--")
        for action in parser._actions
        for option in action.option_strings
        if option.startswith("--")
    ]
    if key.replace(".init_args.", ".") in known:
        return f" Did you mean {prefix + key.replace('.init_args.', '.')!r}?"
    parent, dot, leaf = key.rpartition(".")
    elsewhere = [name for name in known if name.rpartition(".")[2] == leaf]
    if elsewhere:
        return f" Did you mean {prefix + elsewhere[0]!r}?"
    while True:
        siblings = {
            name.removeprefix(parent + dot).partition(".")[0]
            for name in known
            if name.startswith(parent + dot)
        }
        if siblings or not parent:
            break
        leaf = parent.rpartition(".")[2]
        parent, dot, _ = parent.rpartition(".")
    near = did_you_mean(leaf, sorted(siblings))
    return near.replace("'", f"'{prefix}{parent}{dot}", 1) if near else ""


def _arguments(class_path: str) -> list[str]:
    """The arguments of a class or function, as the parser sees them."""
    module, _, name = class_path.rpartition(".")
    found = getattr(sys.modules.get(module), name, None)
    parser = ArgumentParser()
    if isinstance(found, type):
        return list(parser.add_class_arguments(found, fail_untyped=False))
    return list(parser.add_function_arguments(found, fail_untyped=False)) if found else []


def _names_in(module: str) -> Iterable[str]:
    return [name for name in dir(sys.modules.get(module)) if not name.startswith("_")]


def _readable(types: str) -> str:
    """``<class 'int'>, list[int], <class 'NoneType'>`` as ``int, list[int] or null``."""
    text = (
        re.sub(r"<class '([^']+)'>", r"\1", types)
        .replace("typing.", "")
        .replace("NoneType", "null")
    )
    text = re.sub(r"\b[\w.]+\.(\w+)", r"\1", text)
    literal = r"Literal\[((?:[^\[\]]|\[[^\]]*\])*)\]"
    text = re.sub(literal, lambda match: match[1], text)
    first, comma, last = text.rpartition(", ")
    whole = last.count("[") == last.count("]")
    return f"{first} or {last}" if comma and whole else text


def shorten_help(text: str) -> str:
    """Remove long lists of subclasses from a help text, such as hundreds of PyTorch modules."""
    return re.sub(r",\s+known\s+subclasses:[^)]{1500,}\)", ")", text)
