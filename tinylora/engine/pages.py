"""Pages of the KV cache by number: which are free, and how many sequences hold each."""

from collections import Counter
from collections.abc import Sequence


class Pages:
    """Page numbers 0 .. count-1 with the number of their holders."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.free = list(range(count - 1, -1, -1))  # the lowest is taken first
        self.holders: Counter[int] = Counter()

    def take(self, number: int) -> list[int]:
        """`number` free pages, held once each."""
        taken = [self.free.pop() for _ in range(number)]
        self.holders.update(taken)
        return taken

    def hold(self, pages: Sequence[int]) -> None:
        """One more holder for each page."""
        self.holders.update(pages)

    def drop(self, pages: Sequence[int]) -> None:
        """One holder less; a page without holders is free. RuntimeError for a page that nobody holds."""
        for page in pages:
            if self.holders[page] < 1:
                raise RuntimeError(f"page {page} is given back twice")
            self.holders[page] -= 1
            if not self.holders[page]:
                del self.holders[page]
                self.free.append(page)
