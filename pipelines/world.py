"""World: the processes that load one run's data together, as one of them sees it."""

from dataclasses import dataclass

__all__ = ["World"]


@dataclass(frozen=True, kw_only=True)
class World:
    """This process's place among those of a run; alone, if nothing is given."""

    rank: int = 0
    """This process: 0 to world_size - 1."""
    world_size: int = 1
    """Processes that share every global batch."""
    local_world_size: int = 1
    """Those of them on this machine, which share its CPUs and its cache."""

    @property
    def num_nodes(self) -> int:
        """Machines, if each has as many processes as this one."""
        return -(-self.world_size // self.local_world_size)

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(
                f"rank is {self.rank}: in a world of {self.world_size} it must be 0 to {self.world_size - 1}"
            )
        if not 1 <= self.local_world_size <= self.world_size:
            raise ValueError(
                f"local_world_size is {self.local_world_size}: it must be between 1 and the world's {self.world_size}"
            )
