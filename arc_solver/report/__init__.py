"""What a run or a training came to, as one page that any browser opens.

In the order of reading; each imports only from those before it:

    reasons   why a task was not solved, as far as can be told
    collect   a run's folder -> plain values, read again only where something is new
    page      values -> HTML: `page.css`, `page.js` and the templates are beside it
    command   `bin/report`
"""
