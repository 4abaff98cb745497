"""Pictures of data, training and predictions, drawn with matplotlib and written as files."""
