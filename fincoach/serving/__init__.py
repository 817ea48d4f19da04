"""What a backend imports: services that stand on files and a database, never on training code."""

_WHERE = {
    "CoachingRecommendation": "recommendation",
    "EnhancedCQLModelService": "recommendation",
    "EnhancedModelManager": "manager",
    "FinancialHealthForecaster": "health",
    "GoalPredictionService": "goals",
    "PredictionCache": "cache",
    "ServiceError": "segmentation",
    "SpendingPrediction": "spending",
    "SpendingPredictionService": "spending",
    "UserSegmentation": "segmentation",
    "UserSegmentationService": "segmentation",
}

__all__ = [
    "CoachingRecommendation", "EnhancedCQLModelService", "EnhancedModelManager", "FinancialHealthForecaster", "GoalPredictionService", "PredictionCache", "ServiceError", "SpendingPrediction",
    "SpendingPredictionService", "UserSegmentation", "UserSegmentationService",
]


def __getattr__(name: str):
    """Import a service when it is first asked for, so that one service does not load what another needs."""
    if name in _WHERE:
        from importlib import import_module

        return getattr(import_module(f"fincoach.serving.{_WHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
