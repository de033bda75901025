"""What a run or a training came to, as one page that any browser opens.

In the order of reading; each imports only from those before it:

    reasons   why a task was not solved, as far as can be told
    collect   a run's folder -> plain values, read again only where something is new
    compare   two runs of the same tasks
    training  a training's folder -> plain values
    page      values -> HTML: `page.css`, `page.js` and the templates are beside it
    writer    the page of a run that goes on
    command   `bin/report`
"""

from .training import is_training
from .writer import PageWriter

__all__ = ["PageWriter", "is_training"]
