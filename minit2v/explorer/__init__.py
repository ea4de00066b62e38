"""The architecture explorer: one web page about one model. The page needs no network and no library.

`trace.py` runs the networks on `meta` and counts. `sample.py` runs them with weights, for times and attention maps.
`drawing.py` draws the UNet as SVG. `page.py` puts it all into `page.html`, `page.css` and `page.js`.
"""
