"""`powerplan report`: what powerplan knows of a model on one HTML page, that needs no network.

asked has the answers, standing, layers, costs, measured and counting turn them into plain data (content), charts makes
specs of charts, and render the HTML. jinja2 and vl-convert-python are imported when a page is rendered.
"""
