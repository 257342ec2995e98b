document.querySelectorAll(".scripted").forEach((part) => { part.hidden = false; });
liven(document);
