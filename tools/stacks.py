"""The two sets of packages that this project runs on, and which Python takes which.

*classic* has Reverb and is what the published results were made with; *modern* runs wherever JAX and Ray have
wheels. Standard library only, Python >= 3.6, as for all of the set-up.
"""

from typing import Dict, NamedTuple, Tuple

Version = Tuple[int, int]  # (major, minor)
Platform = Tuple[str, str]  # (system, processor), as `platform` names them

LINUX_X86, LINUX_ARM, MAC_ARM = ("Linux", "x86_64"), ("Linux", "aarch64"), ("Darwin", "arm64")
FOLDER = "requirements"


class Stack(NamedTuple):
    """A set of pinned packages: who can install it, and what it takes."""

    name: str
    pythons: Tuple[Version, ...]  # the one to take first comes first
    platforms: Dict[bool, Tuple[Platform, ...]]  # by `cuda`
    limit: str  # why it runs nowhere else
    needed_gb: Dict[bool, float]  # by `cuda`: the environment and what was downloaded for it

    def lock(self, cuda: bool) -> str:
        """Path of the lock below the root of the checkout."""
        return f"{FOLDER}/{self.name}{'-cuda' if cuda else ''}.lock"

    def wishes(self, cuda: bool) -> str:
        """Path of the file that the lock is resolved from."""
        return f"{FOLDER}/{self.name}{'-cuda' if cuda else ''}.in"

    @property
    def overrides(self) -> str:
        """Path of the pins that replace what packages ask of each other."""
        return f"{FOLDER}/{self.name}-overrides.txt"


CLASSIC = Stack(
    name="classic",
    pythons=((3, 11),),
    platforms={False: (LINUX_X86,), True: (LINUX_X86,)},
    limit="Reverb exists for Linux x86_64 only",
    needed_gb={False: 4.0, True: 12.0},  # 3.0 and (without bytecode) 7.9 installed
)
MODERN = Stack(
    name="modern",
    pythons=(
        (3, 13),
        (3, 12),
    ),  # 3.14 lacks wheels of Ray 2.53.0 and pygame 2.6.1: `make lock` says if it still does
    platforms={False: (LINUX_X86, LINUX_ARM, MAC_ARM), True: (LINUX_X86, LINUX_ARM)},
    limit="JAX and Ray have packages for Linux x86_64, Linux aarch64 and macOS arm64 only",
    needed_gb={False: 3.0, True: 10.0},  # 2.0 and (without bytecode) 5.5 installed
)
STACKS = (CLASSIC, MODERN)  # in the order in which a machine that can run both takes them
PYTHONS = tuple(version for stack in STACKS for version in stack.pythons)


def stack_of(version: Version) -> Stack:
    """The stack of a supported Python."""
    return next(stack for stack in STACKS if version in stack.pythons)


def dotted(version: Version) -> str:
    """A version as people write it."""
    return ".".join(map(str, version))
