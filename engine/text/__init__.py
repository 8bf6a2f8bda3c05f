"""Text processing for one model, without torch; `text_model.TextModel` is the entry."""
