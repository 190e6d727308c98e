"""One self-contained HTML page about an artifact: what it weighs, what the passes did, what it costs, its proof."""
