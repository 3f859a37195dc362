"""What a run produces besides weights: metrics, tracker values, model card, merged model, upload."""
