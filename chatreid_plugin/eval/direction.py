"""Whether scores stand the wrong way round, as distances do; asked of a sample of the queries.

Higher is better everywhere here, while torchreid's and fast-reid's matrices are distances: ranked as they are, they
give a low mAP and no error.
"""

import numpy as np


SAMPLE = 200  # queries
DEVIATIONS = 3.0  # standard errors


class DirectionProbe:
    """Collects average precisions of some queries, as scored and in reversed order."""

    def __init__(self, queries: int) -> None:
        count = min(queries, SAMPLE)  # none: nothing is asked
        self.sample = {place * queries // count for place in range(count)}
        self.precisions: list[tuple[float, float]] = []

    def explain(self, remedy: str) -> str:
        """Say that the reversed order is far better, and the remedy; nothing if it is not.

        Far better is half as much again, and no chance: by three standard errors of the queries' differences, with
        room for a handful of queries.
        """
        if not self.precisions:
            return ""
        given, turned = np.array(self.precisions).T
        gains = turned - given
        chance = DEVIATIONS * float(gains.std()) / len(gains) ** 0.5 + 1.0 / len(gains)
        if gains.mean() <= chance or turned.mean() <= 1.5 * given.mean():
            return ""
        return (
            f"In reversed order these scores rank far better: mAP {100 * turned.mean():.1f} instead of "
            f"{100 * given.mean():.1f} over {len(gains)} queries. Higher has to be better: if they are distances, "
            f"{remedy}."
        )
