"""From scores to results: metrics, the item cache, results.json, tables, charts, comparisons, published references."""
