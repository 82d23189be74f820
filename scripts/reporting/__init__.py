"""The parts of the report: statistics, pictures as data and as files, the HTML page, records, bundles."""
