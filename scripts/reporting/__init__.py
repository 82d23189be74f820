"""What the report is made of: statistics, pictures as data and as files, the HTML page, records, bundles."""
