"""Signs of life of long work: a bar on a terminal, else a line now and then."""
import sys
import time

from tqdm import tqdm

EVERY = 30    # seconds between two lines where the output is no terminal


class Bar:
    """Counts work that is done. As a context; tqdm where the errors go to a terminal."""

    def __init__(self, what, total=None, unit="", start=0):
        self.what = what
        self.total = total
        self.unit = unit
        self.done = start
        self.begin = self.last = time.monotonic()
        self.tqdm = None
        if sys.stderr.isatty():
            scale = unit == " bytes"    # 3.2M
            self.tqdm = tqdm(
                total=total, initial=start, desc=what, unit=unit, unit_scale=scale, leave=False
            )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.tqdm is not None:
            self.tqdm.close()

    def update(self, n=1):
        self.done += n
        if self.tqdm is not None:
            self.tqdm.update(n)
            return
        now = time.monotonic()
        if now - self.last >= EVERY:
            self.last = now
            of = f" of {self.total}" if self.total else ""
            print(f"{self.what}: {self.done}{of}{self.unit}, {now - self.begin:.0f} s", flush=True)

    def over(self, work):
        """The items of an iterable, one by one, each counted when the next is asked for."""
        with self:
            for part in work:
                yield part
                self.update()
