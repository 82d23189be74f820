"""Speed and memory, each printing ratios against a named baseline measured in the same process."""
