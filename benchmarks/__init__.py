"""Speed and memory. Each benchmark prints ratios to a named baseline that it measures itself."""
