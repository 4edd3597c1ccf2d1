// theme.js - light or dark before the first paint. Loaded ahead of everything else, on its own.
(() => {
  let theme = "auto";
  try {
    theme = localStorage.getItem("quattuor.theme") || "auto";
  } catch {
    // no storage: as the system says
  }
  if (theme !== "auto") document.documentElement.dataset.theme = theme;
})();
