"""Elsewhere: names that people know from other libraries, and where what they mean is: there, through an adapter, or here."""

from __future__ import annotations

CAPTUM = {
    "lime": "Lime",
    "shap": "GradientShap",
    "gradientshap": "GradientShap",
    "kernelshap": "KernelShap",
    "shapley": "ShapleyValueSampling",
    "shapleyvalues": "ShapleyValueSampling",
    "deepshap": "DeepLiftShap",
    "deeplift": "DeepLift",
    "deepliftshap": "DeepLiftShap",
    "lrp": "LRP",
    "relevancepropagation": "LRP",
    "layerwiserelevancepropagation": "LRP",
    "deconvolution": "Deconvolution",
    "deconvnet": "Deconvolution",
    "featureablation": "FeatureAblation",
    "featurepermutation": "FeaturePermutation",
    "conductance": "LayerConductance",
    "internalinfluence": "InternalInfluence",
}
GRAD_CAM = {
    "gradcamelementwise": "GradCAMElementWise",
    "kpcacam": "KPCA_CAM",
    "shapleycam": "ShapleyCAM",
    "fem": "FEM",
    "segeigencam": "SegEigenCAM",
    "refinecam": "RefineCAM",
}
OURS = {
    "method": {
        **dict.fromkeys(("attention", "rollout", "raw attention", "attn"), "attention_rollout"),
        **dict.fromkeys(("sidu", "sscam", "iscam", "groupcam"), "score_cam or rise, which mask the image likewise"),
        **dict.fromkeys(("smoothgradcam", "smoothgradcampp", "noisetunnel"), "grad_cam:smooth, a wrapper for any method"),
        **dict.fromkeys(("anchors", "superpixel"), "captum.Lime with segments"),
        **dict.fromkeys(("extremal", "torchray"), "extremal_perturbation"),
        **dict.fromkeys(("mask", "fong"), "meaningful_perturbation"),
        **dict.fromkeys(("expectedgradients", "blurig", "guidedig", "xrai"), "integrated_gradients"),
        "vargrad": "gradient:smooth",
    },
    "metric": {
        **dict.fromkeys(("deletion", "pixelflipping", "aopc", "irof", "road", "morf", "selectivity"), "D"),
        **dict.fromkeys(("lerf", "insertionauc"), "I"),
        **dict.fromkeys(("iou", "maxboxacc", "wsol"), "BA and OM"),
        **dict.fromkeys(("energypointinggame", "relevancemass", "attributionlocalisation"), "EP and mass_inside"),
        **dict.fromkeys(("complexity", "sparseness"), "gini and sparsity"),
        **dict.fromkeys(("infidelity", "sensitivitymax", "maxsensitivity"), "class_sensitivity here; captum.metrics has it"),
        **dict.fromkeys(("mprt", "modelparameterrandomisation", "sanitycheck", "sanity"), "randomisation"),
        **dict.fromkeys(("averageconfidenceincrease", "increaseinconfidence"), "AI"),
    },
}


def hint(kind: str, name: str) -> str | None:
    """Where a ``method`` or ``metric`` of that name is; None of a name that nobody has.

    >>> hint("method", "LIME")
    "captum.Lime takes it from Captum (pip install 'foveate[captum]')"
    """
    plain = "".join(character for character in name.lower().replace("+", "p") if character.isalnum())
    if kind == "method" and plain in CAPTUM:
        also = ", or captum.KernelShap" if plain == "shap" else ", or zennit for rules of your own" if plain == "lrp" else ""
        return f"captum.{CAPTUM[plain]} takes it from Captum (pip install 'foveate[captum]'){also}"
    if kind == "method" and plain in GRAD_CAM:
        return f"pytorch_grad_cam.{GRAD_CAM[plain]} takes it from pytorch-grad-cam (pip install 'foveate[grad-cam]')"
    ours = {"".join(filter(str.isalnum, known)): place for known, place in OURS.get(kind, {}).items()}
    return f"what comes near is {ours[plain]}" if plain in ours else None
