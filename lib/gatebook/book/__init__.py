"""The rendered book: the list of papers, the scoreboard, and the Sphinx extension."""
