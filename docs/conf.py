"""The book: built by ``make docs``, on the reader's machine. Every code block in docs/book is run."""

import os

project, author = "tinyunet", "the tinyunet developers"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme = "furo"
html_title = "tinyunet"
html_show_copyright = False
exclude_patterns = ["images"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_merge_streams = True
autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_preserve_defaults = True
napoleon_google_docstring = False
napoleon_custom_sections = [("Common parameters", "params_style")]
# A page of the book links into the source; these files are no pages.
suppress_warnings = ["myst.xref_missing", "myst.header", "misc.highlighting_failure"]
# The cells are run by processes that inherit these: one thread, as the roofline is that of one core.
os.environ.setdefault("PYTHONWARNINGS", "ignore")
os.environ |= {"OPENBLAS_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
