"""What a run produces in addition to weights: metrics, tracker values, model card, merged model, upload."""
