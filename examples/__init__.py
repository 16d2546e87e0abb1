"""Small worlds that show, in minutes and without a download, what the methods do."""
