// What the theme leaves unnamed for screen readers.
document.addEventListener("DOMContentLoaded", () => {
  for (const summary of document.querySelectorAll(".has-children > details > summary")) {
    const parent = summary.closest(".has-children").querySelector("a");
    summary.setAttribute("aria-label", `Pages under ${parent.textContent.trim()}`);
  }
  for (const entry of document.querySelectorAll(".citation-list > .citation")) {
    entry.setAttribute("role", "listitem"); // a list may not hold anything else
  }
});
