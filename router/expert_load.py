"""How many rows each expert got lately, and whether they fall on groups more unevenly than by chance."""

import numpy as np
from numpy.typing import NDArray

from router.split import rows_per_group

# G groups   L layers   E experts of a layer

# Standard deviations that the busiest group may be above the mean by chance. A count of independent rows has
# one of sqrt(mean) at most (Poisson; decay takes it to sqrt(mean / 2)). For those, 3 would do, also over
# hundreds of layers and groups that are looked at again and again; but tokens of one text are alike.
_CHANCE = 4.0


class ExpertLoad:
    """Counts rows; older ones count less. Times are in seconds, of any clock that never goes back."""

    def __init__(self, num_layers: int, num_experts: int, half_life_s: float, now_s: float) -> None:
        self._half_life_s = half_life_s
        self._rows_LE = np.zeros((num_layers, num_experts))
        self._decayed_at = now_s

    @property
    def rows_LE(self) -> NDArray[np.float64]:
        return self._rows_LE

    def add(self, rows_LE: NDArray[np.int64], now_s: float) -> None:
        """Count rows that were just sent."""
        self._rows_LE *= 0.5 ** ((now_s - self._decayed_at) / self._half_life_s)
        self._decayed_at = now_s
        self._rows_LE += rows_LE

    def imbalance(self, held_GLE: NDArray[np.bool_]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Return imbalance_L, most rows of a group / mean, and which of it is more than chance."""
        rows_GL = rows_per_group(self._rows_LE, held_GLE)
        mean_L, most_L = rows_GL.mean(0), rows_GL.max(0)
        imbalance_L = np.divide(most_L, mean_L, out=np.ones_like(mean_L), where=mean_L > 0)
        return np.maximum(imbalance_L, 1.0), most_L - mean_L > _CHANCE * np.sqrt(mean_L)
