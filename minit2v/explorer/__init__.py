"""The architecture explorer: one web page about one model, which needs no network and no library.

`trace.py` runs the networks on `meta` and counts. `sample.py` runs them with weights: times and attention maps.
`drawing.py` draws the U as SVG. `page.py` puts it all into `page.html`, `page.css` and `page.js`.
"""
