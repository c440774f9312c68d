"""`tandem report`: one HTML page from the folders of one or several runs."""
